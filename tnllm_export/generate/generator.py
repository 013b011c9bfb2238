"""Text from any runtime: reads prompts in pieces, chooses tokens, and tells about each as it comes."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from tnllm_export.errors import PromptError, RequestError, SamplingError, TextUnsupportedError
from tnllm_export.generate.choices import Chooser
from tnllm_export.generate.decoding import make_decoding, tokens_behind
from tnllm_export.generate.params import SamplingParams
from tnllm_export.generate.prompts import Prompt, encode_prompts
from tnllm_export.generate.reading import read_prompts
from tnllm_export.generate.sequence import Event, Generation, RunningSequence, Stopwatch
from tnllm_export.generate.session import Session, check_session
from tnllm_export.models.tokenizer import Tokenizer
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import Runtime, State

GREEDY = SamplingParams()
"""Always the likeliest token, up to the default length."""


class Generator:
    """Generates with one runtime; holds nothing between calls.

    Attributes:
        runtime: What runs the model.
        tokenizer: Needed for text in and out; without it prompts are token ids and texts are "".
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None = None,
        *,
        prefill_chunk: int = 512,
        prompt_limit: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """Make a generator.

        Args:
            runtime: What runs the model.
            tokenizer: The model's, where it has one.
            prefill_chunk: Prompts are read in pieces of so many tokens, which bounds the memory of prefill.
            prompt_limit: Longest prompt that is taken, in tokens; None: any. The model itself has no limit.
            progress: Told how much of the prompts has been read.

        Raises:
            RequestError: `prefill_chunk` or `prompt_limit` is below 1.
        """
        for name, value in (("prefill_chunk", prefill_chunk), ("prompt_limit", prompt_limit)):
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; expected at least 1 token")
        self.runtime = runtime
        self.tokenizer = tokenizer
        self._chunk = prefill_chunk
        self._limit = prompt_limit
        self._progress = progress
        self._config = runtime.info.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        sessions: Sequence[Session | None] | None = None,
        keep_sessions: bool = False,
    ) -> list[Generation]:
        """Generate to the end, all prompts in one batch.

        Args:
            prompts: One prompt or several, each text or token ids.
            params: For all, or one for each prompt (same prompt, several seeds: several texts).
            sessions: For each prompt the session that it continues, or None. A prompt may then be empty.
            keep_sessions: Whether each `Generation` shall hold a `session` to continue from.

        Returns:
            One `Generation` per prompt, in their order.

        Raises:
            PromptError: An empty prompt, one above the limit, a token id outside the vocabulary.
            TextUnsupportedError: Text or stop strings without a tokenizer.
            StateError: A session of another model.
            RuntimeTargetError: The model's logits are not finite.
        """
        events = self.stream(prompts, params, sessions=sessions, keep_sessions=keep_sessions)
        done = [event.generation for event in events if event.generation is not None]
        return sorted(done, key=lambda generation: generation.index)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        sessions: Sequence[Session | None] | None = None,
        keep_sessions: bool = False,
    ) -> Iterator[Event]:
        """Generate and give each token when it is there; arguments and errors as in `generate`.

        Arguments are checked at once; the model runs while the iterator is read.
        """
        vocab = self._config.vocab_size
        ids = encode_prompts(prompts, self.tokenizer, vocab, self._limit)
        all_params = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        all_sessions = [None] * len(ids) if sessions is None else list(sessions)
        if len(all_params) != len(ids):
            raise SamplingError(f"{len(all_params)} sampling parameters; expected {len(ids)}, one per prompt, or one")
        if len(all_sessions) != len(ids):
            raise RequestError(f"{len(all_sessions)} sessions; expected {len(ids)}, one per prompt (or None)")
        for index, (prompt, row_params, session) in enumerate(zip(ids, all_params, all_sessions, strict=True)):
            if session is not None:
                check_session(session, self.runtime.info)
            elif not prompt:
                raise PromptError(f"prompt {index} is empty; expected at least one token")
            if row_params.stop and self.tokenizer is None:
                raise TextUnsupportedError("stop strings given, but the model has no tokenizer; leave them out")
        rows = [
            RunningSequence(index, prompt, row_params, vocab, self.tokenizer, session)
            for index, (prompt, row_params, session) in enumerate(zip(ids, all_params, all_sessions, strict=True))
        ]
        return self._run(rows, self._state(all_sessions), keep_sessions)

    def _state(self, sessions: Sequence[Session | None]) -> State:
        if not any(sessions):
            return self.runtime.initial_state(len(sessions))
        zero = self.runtime.host_state(self.runtime.initial_state(1))
        parts = [zero if session is None else session.state for session in sessions]
        return self.runtime.device_state([torch.cat(layer) for layer in zip(*parts, strict=True)])

    def _run(self, rows: list[RunningSequence], state: State, keep_sessions: bool) -> Iterator[Event]:
        reading, decoding = Stopwatch(), Stopwatch()
        with reading.running():
            logits, state = read_prompts(self.runtime, rows, state, self._chunk, self._progress)
        steps = make_decoding(self.runtime, state, keep_logits=keep_sessions)
        events = [(place, event) for place, row in enumerate(rows) if (event := row.start())]
        while True:
            ended = [place for place, event in events if event.finish_reason is not None]
            states = steps.host_state(ended) if keep_sessions and ended else None
            for place, event in events:
                if event.finish_reason is not None:
                    row = rows[place]
                    session = None
                    if states is not None:
                        session = row.session(states, ended.index(place), steps.logits(place))
                    whole = row.generation(event.finish_reason, reading.seconds, decoding.seconds, session)
                    event = replace(event, generation=whole)  # noqa: PLW2901
                # While a step is under way, a reader's time is also that in which the next token is made.
                with decoding.running() if steps.under_way else nullcontext():
                    yield event
            left = [place for place, row in enumerate(rows) if not row.finished]
            if not left:
                return
            with decoding.running():
                if len(left) < len(rows):
                    rows = [rows[place] for place in left]
                    steps.keep(left)
                    logits = None if logits is None else logits[left]
                if logits is None:
                    tokens = steps.next_tokens(rows)
                else:
                    tokens = tokens_behind(logits, rows, Chooser(rows, logits.device), self.runtime.info)
                    logits = None
                eos = self._config.eos_token_id
                events = [(place, row.take(tokens[place], eos)) for place, row in enumerate(rows)]
