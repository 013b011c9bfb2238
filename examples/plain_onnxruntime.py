"""A bundle's graphs in plain ONNX Runtime: needs onnxruntime, numpy and sentencepiece, not this package.

python examples/plain_onnxruntime.py BUNDLE [PROMPT]
"""

import sys

import numpy as np
import onnxruntime as ort
import sentencepiece

folder = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "It was a fine morning in May, and"
tokenizer = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
prefill, decode = (ort.InferenceSession(f"{folder}/{name}.onnx") for name in ("prefill", "decode"))

# An empty context is a state of zeros, [1, H, K, V] float32 for each layer.
ports = [port for port in decode.get_inputs() if port.name.startswith("past_state.")]
state = {port.name: np.zeros((1, *port.shape[1:]), np.float32) for port in ports}
ids = np.array([tokenizer.encode(prompt)], np.int64)
inputs = {"input_ids": ids, "lengths": np.array([ids.shape[1]], np.int32), "positions": np.zeros(1, np.int64)}
logits, *present = prefill.run(None, inputs | state)

tokens = ids[0].tolist()
for _ in range(24):
    tokens.append(int(logits.reshape(-1, logits.shape[-1])[-1].argmax()))
    state = dict(zip(state, present, strict=True))  # outputs have the order of the inputs: logits, then layer by layer
    # The new token stands behind all that the state holds.
    inputs = {"input_ids": np.array([tokens[-1:]]), "positions": np.array([len(tokens) - 1])}
    logits, *present = decode.run(None, inputs | state)
print(tokenizer.decode(tokens))
