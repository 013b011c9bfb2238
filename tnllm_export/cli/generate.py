"""`tnllm generate`: text from a bundle, as it comes."""
# ruff: noqa: PLC0415 - `tnllm --help` and completion must not wait for torch

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tnllm_export.cli.options import (
    BundleArgument,
    DeviceOption,
    JsonOption,
    RuntimeName,
    RuntimeOption,
    ThreadsOption,
)
from tnllm_export.cli.session import Session, session

if TYPE_CHECKING:
    from tnllm_export.generate import Generation, Prompt

EPILOG = """[bold]Examples[/bold]

tnllm generate bundle --prompt "It was a fine morning" --temperature 0.7 --top-p 0.9

tnllm generate bundle --prompt-ids 5,17,3 --max-new-tokens 20 --json

tnllm generate bundle --prompt-file chapter.txt --save-state chapter.state

tnllm generate bundle --load-state chapter.state --max-new-tokens 200

tnllm generate bundle --prompt "It was a fine morning" --runtime torch --device cuda"""


def generate(
    bundle: BundleArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue; repeat for a batch.")
    ] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option("--prompt-ids", metavar="1,2,3", help="Token ids to continue; may be repeated.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help="UTF-8 file to continue, - for stdin, less one newline at its end; may be repeated.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens up to this probability only.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, makes repeated tokens less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws. Default: a new one.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the model's end token.")] = False,
    save_state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the state to this file, new or an earlier state, to continue later."),
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Continue from such a file; a prompt is optional then.")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(help="Read prompts in pieces of so many tokens.")] = 512,
    prompt_limit: Annotated[int | None, typer.Option(help="Refuse longer prompts, in tokens. Default: none.")] = None,
    runtime: RuntimeOption = RuntimeName.ONNXRUNTIME,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Continue one or several prompts, and print the text as it comes.

    Without a tokenizer in the bundle, prompts and output are token ids.
    """
    with session(json_output) as current:
        from tnllm_export import api
        from tnllm_export.generate import check_state_path

        prompts = collect_prompts(prompt or [], prompt_ids or [], prompt_file or [], optional=load_state is not None)
        if len(prompts) > 1 and (save_state or load_state):
            raise typer.BadParameter("--save-state and --load-state take one prompt, not a batch")
        if save_state is not None:
            check_state_path(save_state)
        generator = api.generator(
            bundle,
            runtime.value,
            device=None if device is None else device.value,
            threads=threads,
            prefill_chunk=prefill_chunk,
            prompt_limit=prompt_limit,
            progress=current.progress,
        )
        resumed = None if load_state is None else api.load_state(load_state, generator.runtime)
        params = api.SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=_choose_seed(seed, None if resumed is None else resumed.seed),
            max_new_tokens=max_new_tokens,
            stop=tuple(stop or ()),
            stop_at_eos=not ignore_eos,
        )
        events = generator.stream(
            prompts, params, sessions=None if resumed is None else [resumed], keep_sessions=save_state is not None
        )
        done = Printer(current, prompts, as_text=generator.tokenizer is not None).follow(events)
        if save_state is not None and done[0].session is not None:
            api.save_state(save_state, done[0].session, generator.runtime)
        current.document = {"seed": params.seed, "generations": [to_json(generation) for generation in done]}
        for generation in done:
            current.note(describe(generation, params.seed if temperature > 0 else None))


def collect_prompts(texts: list[str], ids: list[str], files: list[Path], *, optional: bool) -> "list[Prompt]":
    """Return the prompts in the order text, token ids, files.

    Raises:
        typer.BadParameter: There is none, and that is not `optional`.
        PromptError: Token ids that are no integers, or a file that is no UTF-8.
    """
    prompts: list[Prompt] = [*texts, *map(parse_ids, ids), *map(_read_prompt, files)]
    if not prompts and optional:
        return [[]]
    if not prompts:
        raise typer.BadParameter("no prompt; give --prompt, --prompt-ids or --prompt-file (or --load-state)")
    return prompts


def parse_ids(text: str) -> list[int]:
    """Read token ids from `1,2,3`. Raises PromptError."""
    from tnllm_export.errors import PromptError

    ids = []
    for part in filter(None, text.replace(",", " ").split()):
        try:
            ids.append(int(part))
        except ValueError:
            raise PromptError(f"--prompt-ids has {part!r}; expected integers, as in 1,2,3") from None
    return ids


class Printer:
    """Writes a batch's texts one after the other: the first as it comes, the next from where it is by then."""

    def __init__(self, current: Session, prompts: "list[Prompt]", *, as_text: bool, echo: bool = False) -> None:
        """Make a printer.

        Args:
            current: Where to write.
            prompts: The batch.
            as_text: Whether tokens are written as text or as ids.
            echo: Whether a single prompt is written before its continuation; on a terminal it always is.
        """
        self._session = current
        self._echo = echo or sys.stdout.isatty()
        self._prompts = prompts
        self._as_text = as_text
        self._waiting: dict[int, list[str]] = {index: [] for index in range(len(prompts))}
        self._finished: set[int] = set()
        self._shown = -1

    def follow(self, events: Any) -> "list[Generation]":
        """Write what comes and return the generations in the order of their prompts."""
        done: dict[int, Generation] = {}
        self._show_next()
        for event in events:
            piece = event.text if self._as_text else "" if event.token_id is None else f"{event.token_id} "
            if event.index == self._shown:
                self._session.write(piece)
            else:
                self._waiting[event.index].append(piece)
            if event.generation is not None:
                done[event.index] = event.generation
                self._finished.add(event.index)
                self._show_finished()
        return [done[index] for index in sorted(done)]

    def _show_finished(self) -> None:
        while self._shown in self._finished:
            self._session.write("\n")
            self._show_next()

    def _show_next(self) -> None:
        self._shown += 1
        if self._shown < len(self._prompts):
            self._write_head(self._shown)
            self._session.write("".join(self._waiting[self._shown]))

    def _write_head(self, index: int) -> None:
        """Name the prompt where there are several, as `head` does; on a terminal, let the text follow its prompt."""
        prompt = self._prompts[index]
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        if len(self._prompts) > 1:
            self._session.write(f"{'' if index == 0 else chr(10)}==> {' '.join(text.split())[:72]} <==\n")
        elif self._echo and text:
            bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
            self._session.write(f"{bold}{text}{plain}{'' if isinstance(prompt, str) else ' '}")


def to_json(generation: "Generation") -> dict[str, Any]:
    """Return a generation in JSON's types."""
    return {
        "index": generation.index,
        "prompt_ids": list(generation.prompt_ids),
        "token_ids": list(generation.token_ids),
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "prefill_seconds": round(generation.prefill_seconds, 6),
        "decode_seconds": round(generation.decode_seconds, 6),
        "tokens_per_second": round(generation.tokens_per_second, 3),
    }


def describe(generation: "Generation", seed: int | None) -> str:
    """Return one line about speed and end."""
    drawn = "" if seed is None else f", seed {seed}"
    made = (
        f"{len(generation.token_ids)} tokens ({generation.finish_reason}), {generation.tokens_per_second:.1f} tokens/s"
    )
    return f"{made}; prompt of {len(generation.prompt_ids)} read in {generation.prefill_seconds:.2f} s{drawn}"


def _choose_seed(given: int | None, resumed: int | None) -> int:
    """A saved sequence goes on with its own random numbers, unless other ones are asked for."""
    if given is not None:
        return given
    return secrets.randbits(31) if resumed is None else resumed


def _read_prompt(path: Path) -> str:
    """Read a prompt without the newline that ends a file: as a last token it would change what follows."""
    from tnllm_export.cli.verify import read_text
    from tnllm_export.errors import PromptError

    if str(path) == "-" and sys.stdin is None:
        raise PromptError("--prompt-file - reads stdin, which is closed; give a prompt another way")
    # Read as text, "\r\n" is "\n" by now.
    text = sys.stdin.read() if str(path) == "-" else read_text(path)
    return text.removesuffix("\n")
