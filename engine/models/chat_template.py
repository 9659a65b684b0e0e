"""A tokenizer's chat template: what it makes of a user's turn, found out before anything depends on it."""

from typing import Any

from etpo.engine.models.text_tokens import TextTokens, special_ids

_PROBE = "A turn 4711 of a user"
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


class ChatTemplate:
    """Puts a user's turn as the template has it: with a system message where it asks for one.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Attributes:
        end_of_turn: id of the special token behind an assistant's turn, or None.

    Raises:
        ValueError: the template raises, or leaves the turn out, in whatever form it is given.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        failures = []
        for self._as_parts in (False, True):
            for self._system in ([], [_SYSTEM]):
                try:
                    if _PROBE in self.render(_PROBE):
                        self.end_of_turn = self._find_end_of_turn()
                        return
                    failures.append("a text without the turn's content")
                except Exception as error:
                    failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        raise ValueError(
            f"the tokenizer's chat template: expected a text of one user's turn, got {failures[0]}"
        )

    def render(self, content: str) -> str:
        """The text up to where the model's turn begins."""
        return self._apply([self._turn("user", content)], add_generation_prompt=True)

    def encode(self, content: str, text: TextTokens) -> list[int]:
        """The rendered turn's tokens; what the content spells stays text."""
        if not text.spells_control(content):
            return text.parsed(self.render(content))
        before, _, behind = self.render(_PROBE).partition(_PROBE)
        return [*text.parsed(before), *text(content), *text.parsed(behind)]

    def _turn(self, role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": content}] if self._as_parts else content}

    def _apply(self, turns: list[dict[str, Any]], **settings: Any) -> str:
        turns = [*self._system, *turns]
        text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, **settings)
        return text

    def _find_end_of_turn(self) -> int | None:
        said = "It is done"
        try:
            text = self._apply([self._turn("user", "Do it"), self._turn("assistant", said)])
        except Exception:  # a template may know questions only
            return None
        behind = text.rpartition(said)[2].lstrip()
        special = special_ids(self._tokenizer)
        ids = self._tokenizer(behind, add_special_tokens=False)["input_ids"]
        return next((token for token in ids if token in special), None)
