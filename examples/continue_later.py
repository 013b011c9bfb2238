"""A long prompt is read once, in pieces, and put aside in a file; another process goes on from there.

python examples/continue_later.py BUNDLE STATE_FILE
"""

import sys

from tnllm_export import api

bundle, state_file = sys.argv[1:]
chapter = "It was a fine morning in May, and the party set out. " * 40
params = api.SamplingParams(temperature=0.7, seed=3, max_new_tokens=30)

# Now: read, generate nothing, save. Pieces of 128 tokens bound the memory, whatever the prompt's length.
generator = api.generator(bundle, prefill_chunk=128)
[read] = generator.generate(chapter, api.SamplingParams(seed=3, max_new_tokens=0), keep_sessions=True)
api.save_state(state_file, read.session, generator.runtime)
print(f"read {read.session.position} tokens")

# Later: load and go on, from the state alone. A prompt may be added; an empty one just continues.
generator = api.generator(bundle)
session = api.load_state(state_file, generator.runtime)
[later] = generator.generate([[]], params, sessions=[session])
print(later.text)

# The same text as without the interruption.
[at_once] = api.generator(bundle, prefill_chunk=128).generate(chapter, params)
print("same as uninterrupted:", later.token_ids == at_once.token_ids)
