"""Parts of `bench_accuracy.py`: networks and their data, what each tool does to them, and the picture."""
