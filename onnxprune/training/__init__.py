"""Fine-tuning: the weights of a pruned graph are trained against the outputs of the original.

Only `settings` and `late` may be imported before it is known that something is to be trained: the rest imports torch.
"""
