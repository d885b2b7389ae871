"""The same networks beside other runtimes: PyTorch, ONNX Runtime."""
