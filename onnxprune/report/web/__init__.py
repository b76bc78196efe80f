"""The page of `onnxprune report`: one HTML file that fetches nothing and runs nothing."""
