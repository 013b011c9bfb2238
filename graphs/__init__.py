"""How a program becomes ONNX: translation, lowerings, passes."""
