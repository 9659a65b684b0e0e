"""How a text state becomes a model's tokens, and its tokens an action: completion, infill or chat.

A state of a coding environment ends in the `def` line of the function that is asked for. `completion` gives
it to the model as it is. `infill` puts it before a hole and a call of the function behind it, with the
model's fill-in-the-middle tokens. `chat` asks for the function in a user's turn. A state that asks for no
function is given as it is by `completion` and `infill`, and is the user's turn in `chat`.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from etpo.engine.models.chat_template import ChatTemplate
from etpo.engine.models.prompt_extract import extract, signature_of
from etpo.engine.models.text_tokens import TextTokens

FormName = Literal["completion", "infill", "chat"]
LEAST_ROOM = 16


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
        ends: further tokens with which the model ends a text, as its configuration has them; those that are
            text are left out.

    Attributes:
        name: the form.
        stop_token: id of the token that ends an action as a rule.
        stop_tokens: all that do.

    Raises:
        ValueError: the tokenizer lacks what the form needs, or there is no such form.
    """

    def __init__(self, tokenizer: Any, name: str = "auto", ends: Iterable[int] = ()) -> None:
        if name != "auto" and name not in get_args(FormName):
            raise ValueError(f"--prompt-form: expected auto, {', '.join(get_args(FormName))}, got {name!r}")
        self.tokenizer = tokenizer
        self._text = TextTokens(tokenizer)
        self._infill = infill_tokens(tokenizer)
        self._chat = _chat_template(tokenizer, name)
        self.name = choose(tokenizer, self._chat) if name == "auto" else name
        self.stop_token: int = tokenizer.eos_token_id
        if self.name == "infill":
            if self._infill is None:
                known = ", ".join(INFILL)
                raise ValueError(
                    f"--prompt-form infill: expected a tokenizer with fill-in-the-middle tokens as {known} "
                    "have them, got one without; use completion"
                )
            self.stop_token = token_id(tokenizer, self._infill.end, tokenizer.eos_token_id)
        elif self.name == "chat":
            if self._chat is None:
                raise ValueError(
                    "--prompt-form chat: expected a tokenizer with a chat template, got one without; "
                    "use completion"
                )
            self.stop_token = self._chat.end_of_turn or tokenizer.eos_token_id
        others = self._text.control.intersection(ends)
        self.stop_tokens = frozenset({self.stop_token, tokenizer.eos_token_id, *others})

    def encode(self, state: str, room: int) -> list[int]:
        """A state's tokens; of one that needs more than `room` the oldest part of the state is cut.

        Special tokens, a template's turns and the line that asks for a function are never cut.

        Raises:
            ValueError: what is never cut needs more than `room`.
        """
        room = max(room, LEAST_ROOM)
        if self.name == "chat":
            return self._encode_chat(state, room)
        start, ids = self._text.start, self._text(state)
        signature = signature_of(state) if self.name == "infill" else None
        if signature is None:
            return [*start, *ids[-max(1, room - len(start)) :]]
        assert self._infill is not None
        before, behind, hole = (
            token_id(self.tokenizer, token, None)
            for token in (self._infill.before, self._infill.behind, self._infill.hole)
        )
        suffix = self._text(infill_suffix(*signature))
        if self.tokenizer.convert_ids_to_tokens(suffix[:1]) == ["▁"]:  # SentencePiece's own leading blank
            suffix = suffix[1:]
        prefix = ids[-max(1, room - len(start) - len(suffix) - 3) :]
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
            last = self._text.control | self.stop_tokens
            ids = ids[: next((i for i, token in enumerate(ids) if token in last), len(ids))]
        # Behind a line end: alone, SentencePiece would take the first blank, which is indentation here.
        anchor = self._text("\n")
        said = self._said(anchor + ids)[len(self._said(anchor)) :]
        return action_of(state, said)

    def texts(self, tokens: Any) -> list[str]:
        """What each drawn token adds to the text, [L]; special tokens add nothing.

        Where several tokens make up one character, the last of them adds it.
        """
        anchor = self._text("\n")
        before = self._said(anchor)
        found = []
        for end in range(1, len(tokens) + 1):
            said = self._said(anchor + [int(token) for token in tokens[:end]])
            whole = said.removesuffix("\ufffd") if end < len(tokens) else said
            found.append(whole[len(before) :])
            before = before if len(whole) < len(before) else whole
        return found

    def _encode_chat(self, state: str, room: int) -> list[int]:
        assert self._chat is not None
        chat, text = self._chat, self._text

        def encode(part: str) -> list[int]:
            return chat.encode(chat_message(part), text)

        ids = encode(state)
        parts = re.findall(r"[^\n]*\n|[^\n]+", state)
        while len(ids) > room and len(parts) > 1:
            parts = parts[1:]
            ids = encode("".join(parts))
        if len(ids) > room and signature_of(state) is None:  # one long line: its end, as long as may be
            line = parts[0] if parts else ""
            least, most = 0, len(line)
            while least < most:
                middle = (least + most + 1) // 2
                least, most = (middle, most) if len(encode(line[-middle:])) <= room else (least, middle - 1)
            ids = encode(line[len(line) - least :])
        if len(ids) > room:
            raise ValueError(
                f"--prompt-form chat: expected room for a prompt of at least {len(ids)} tokens, got {room}; "
                "lower --max-new-tokens, or use completion"
            )
        return ids

    def _said(self, ids: list[int]) -> str:
        said: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return said


def action_of(state: str, said: str) -> str:
    """What of a model's text is the action in a state: in a coding state its function (see `extract`)."""
    signature = signature_of(state)
    return extract(said, signature[0]) if signature else said


def choose(tokenizer: Any, chat: ChatTemplate | None) -> FormName:
    """`chat` where the tokenizer's end token closes a turn of its chat template (an instruct model: base
    models may carry the template of their family, but end in another token), `infill` where it has
    fill-in-the-middle tokens, `chat` where it has any template, else `completion`."""
    if chat is not None and chat.end_of_turn == tokenizer.eos_token_id:
        return "chat"
    if infill_tokens(tokenizer) is not None:
        return "infill"
    return "chat" if chat is not None else "completion"


def _chat_template(tokenizer: Any, name: str) -> ChatTemplate | None:
    """The tokenizer's template where the form may need it. One that does not work is refused where it was
    asked for, else another form is taken and that is said."""
    if name not in ("auto", "chat") or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return ChatTemplate(tokenizer)
    except ValueError as error:
        if name == "chat":
            raise ValueError(f"{error}; use --prompt-form completion") from error
        logging.getLogger(__name__).warning(f"{error}; its states are put to the model without it")
        return None


def infill_tokens(tokenizer: Any) -> InfillTokens | None:
    """The fill-in-the-middle tokens that a tokenizer has, or None."""
    for tokens in INFILL.values():
        if all(token_id(tokenizer, t, None) is not None for t in (tokens.before, tokens.behind, tokens.hole)):
            return tokens
    return None


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


def encoded(form: PromptForm, state: str, room: int) -> list[int]:
    """A state's tokens, at least one: for an empty state without a start token, the stop token."""
    return form.encode(state, room) or [form.stop_token]
