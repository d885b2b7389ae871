"""The same networks in other runtimes: PyTorch, ONNX Runtime, OpenVINO."""
