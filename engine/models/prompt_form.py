"""How a text state becomes a model's tokens, and its tokens an action: completion, infill or chat.

A state of a coding environment ends in the `def` line of the function that is asked for. `completion` gives
it to the model as it is. `infill` puts it before a hole and a call of the function behind it, with the
model's fill-in-the-middle tokens. `chat` asks for the function in a user's turn. A state that asks for no
function is given as it is by `completion` and `infill`, and is the user's turn in `chat`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from etpo.engine.models.prompt_extract import extract, signature_of

FormName = Literal["completion", "infill", "chat"]
LEAST_ROOM = 16
# Tokens of whole files and of holes, which Qwen2.5-Coder and DeepSeek-Coder do not call special.
_OF_FILES = re.compile(r"<\W?(fim[_▁]\w+|file_sep|repo_name)\W?>")


@dataclass(frozen=True)
class InfillTokens:
    """A model family's fill-in-the-middle tokens, in the order prefix, suffix, middle.

    Attributes:
        before, behind, hole: tokens ahead of the prefix, of the suffix, and of what is to be filled in.
        end: with which the model ends what it filled in.
    """

    before: str
    behind: str
    hole: str
    end: str


INFILL = {
    "CodeLlama": InfillTokens("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    "StarCoder2": InfillTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"),
    "Qwen2.5-Coder": InfillTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"),
    "DeepSeek-Coder": InfillTokens(
        "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜end▁of▁sentence｜>"
    ),
}
NO_SEARCH = (
    "Choose one model and its hyperparameters yourself: GridSearchCV, RandomizedSearchCV and their like are "
    "refused. "
)


class PromptForm:
    """One form, with one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        name: the form, or `auto`: `chat` for an instruct model, `infill` for a model with
            fill-in-the-middle tokens, `completion` for all others (see `choose`).

    Attributes:
        name: the form.
        stop_token: id of the token that ends an action.

    Raises:
        ValueError: the tokenizer lacks what the form needs, or there is no such form.
    """

    def __init__(self, tokenizer: Any, name: str = "auto") -> None:
        if name != "auto" and name not in get_args(FormName):
            raise ValueError(f"--prompt-form: expected auto, {', '.join(get_args(FormName))}, got {name!r}")
        self.tokenizer = tokenizer
        self.name = choose(tokenizer) if name == "auto" else name
        self.stop_token: int = tokenizer.eos_token_id
        self._infill = infill_tokens(tokenizer)
        self._ends = special_ids(tokenizer) | file_ids(tokenizer)
        if self.name == "infill":
            if self._infill is None:
                known = ", ".join(INFILL)
                raise ValueError(
                    f"--prompt-form infill: expected a tokenizer with fill-in-the-middle tokens as {known} "
                    "have them, got one without; use completion"
                )
            self.stop_token = token_id(tokenizer, self._infill.end, tokenizer.eos_token_id)
        elif self.name == "chat":
            if not has_template(tokenizer):
                raise ValueError(
                    "--prompt-form chat: expected a tokenizer with a chat template, got one without; "
                    "use completion"
                )
            self.stop_token = end_of_turn(tokenizer) or tokenizer.eos_token_id

    def encode(self, state: str, room: int) -> list[int]:
        """A state's tokens; of one that needs more than `room` the oldest part of the state is cut."""
        room = max(room, LEAST_ROOM)
        if self.name == "chat":
            return self._encode_chat(state, room)
        signature = signature_of(state) if self.name == "infill" else None
        if signature is None:
            return self.tokenizer(state)["input_ids"][-room:]
        assert self._infill is not None
        before, behind, hole = (
            token_id(self.tokenizer, token, None)
            for token in (self._infill.before, self._infill.behind, self._infill.hole)
        )
        suffix = self._ids(infill_suffix(*signature))
        if self.tokenizer.convert_ids_to_tokens(suffix[:1]) == ["▁"]:  # SentencePiece's own leading blank
            suffix = suffix[1:]
        start = [self.tokenizer.bos_token_id] if _puts_bos(self.tokenizer) else []
        prefix = self._ids(state)[-max(1, room - len(start) - len(suffix) - 3) :]
        return [*start, before, *prefix, behind, *suffix, hole]

    def decode(self, state: str, tokens: Any) -> str:
        """The action that the drawn tokens are: the model's text, and of a coding state only its function.

        Args:
            state: what the tokens answer.
            tokens: int64 [L], as drawn, the stop token included where it was drawn.
        """
        ids = [int(token) for token in tokens]
        if self.name != "completion":
            # Behind its own end, or another such token, a model goes on with another file or turn.
            ends = (i for i, token in enumerate(ids) if token in self._ends or token == self.stop_token)
            ids = ids[: next(ends, len(ids))]
        # Behind a line end: alone, SentencePiece would take the first blank, which is indentation here.
        anchor = self._ids("\n")
        said = self._text(anchor + ids)[len(self._text(anchor)) :]
        return action_of(state, said)

    def _encode_chat(self, state: str, room: int) -> list[int]:
        lines = state.splitlines(keepends=True)
        while True:
            turn = [{"role": "user", "content": chat_message("".join(lines))}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = self._ids(text)
            if len(ids) <= room or len(lines) == 1:
                return ids[-room:]
            lines = lines[1:]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def action_of(state: str, said: str) -> str:
    """What of a model's text is the action in a state: in a coding state its function (see `extract`)."""
    signature = signature_of(state)
    return extract(said, signature[0]) if signature else said


def choose(tokenizer: Any) -> FormName:
    """`chat` where the tokenizer's end token closes a turn of its chat template (an instruct model: base
    models may carry the template of their family, but end in another token), `infill` where it has
    fill-in-the-middle tokens, `chat` where it has any template, else `completion`."""
    templated = has_template(tokenizer)
    if templated and end_of_turn(tokenizer) == tokenizer.eos_token_id:
        return "chat"
    if infill_tokens(tokenizer) is not None:
        return "infill"
    return "chat" if templated else "completion"


def infill_tokens(tokenizer: Any) -> InfillTokens | None:
    """The fill-in-the-middle tokens that a tokenizer has, or None."""
    for tokens in INFILL.values():
        if all(token_id(tokenizer, t, None) is not None for t in (tokens.before, tokens.behind, tokens.hole)):
            return tokens
    return None


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def end_of_turn(tokenizer: Any) -> int | None:
    """Id of the special token behind an assistant's turn in the chat template, or None."""
    said = "It is done"
    turns = [{"role": "user", "content": "Do it"}, {"role": "assistant", "content": said}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text.rpartition(said)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    return next((token for token in ids if token in special), None)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all tokens that are no text: those with a role, and all others that were added as special."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def file_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that part files and holes, whether they were added as special or not."""
    added = tokenizer.added_tokens_decoder
    return {number for number, token in added.items() if _OF_FILES.fullmatch(token.content)}


def token_id(tokenizer: Any, token: str, default: Any) -> Any:
    """The id of a token that is one of the vocabulary's own, or the default."""
    return tokenizer.get_vocab().get(token, default)


def infill_suffix(name: str, parameters: str) -> str:
    """What stands behind the hole: a call of the function, so that the model sees where its body ends."""
    names = ", ".join(part.split(":")[0].split("=")[0].strip() for part in parameters.split(","))
    return f"\n\nresult = {name}({names})\n"


def chat_message(state: str) -> str:
    """The user's turn: the state, and for a coding state what to answer."""
    signature = signature_of(state)
    if signature is None:
        return state
    rule = NO_SEARCH if signature[0] == "build_model" else ""
    return (
        f"Complete this Python code. {rule}Answer with the whole function {signature[0]} in one ```python "
        f"block, and nothing else.\n\n```python\n{state.rstrip()}\n```"
    )


def _puts_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def encoded(form: PromptForm, state: str, room: int) -> list[int]:
    """A state's tokens, at least one: for an empty state without a start token, the stop token."""
    return form.encode(state, room) or [form.stop_token]
