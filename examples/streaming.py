"""Several prompts in one batch, drawn with different seeds; each token is printed when it is there.

python examples/streaming.py BUNDLE
"""

import sys

from tnllm_export import api

PROMPTS = ["Elizabeth had never in her life", "The next morning"]

generator = api.generator(sys.argv[1])
params = [api.SamplingParams(temperature=0.7, top_p=0.9, seed=seed, max_new_tokens=40) for seed in range(len(PROMPTS))]
for event in generator.stream(PROMPTS, params):
    # Text may be held back for a moment: no event ends within a character or within what may become a stop string.
    print(f"{event.index} {event.token_id:5} {event.text!r}", flush=True)
    if event.generation is not None:
        done = event.generation
        print(f"{event.index} ended ({done.finish_reason}): {PROMPTS[done.index]}{done.text}")
