"""Text as tokens that are text, and the tokens of a tokenizer that are none."""

import itertools
import re
from typing import Any

# Tokens of whole files and of holes, which Qwen2.5-Coder and DeepSeek-Coder do not call special.
_OF_FILES = re.compile(r"<\W?(fim[_▁]\w+|file_sep|repo_name)\W?>")


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all tokens that are no text: those with a role, and all others that were added as special."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def file_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that part files and holes, whether they were added as special or not."""
    added = tokenizer.added_tokens_decoder
    return {number for number, token in added.items() if _OF_FILES.fullmatch(token.content)}


class TextTokens:
    """Encodes text so that nothing in it becomes a control token, whatever it spells.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Attributes:
        control: ids of the tokens that are no text.
        start: ids that the tokenizer puts before every text, such as its start token. What it puts behind
            one is no part of a prompt: behind an end token a model has nothing to say.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.control = special_ids(tokenizer) | file_ids(tokenizer)
        names = sorted({tokenizer.convert_ids_to_tokens(i) for i in self.control}, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._not_text = self.control - {tokenizer.unk_token_id}
        plain, whole = self.parsed("a"), list(tokenizer("a")["input_ids"])
        begins = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.start: list[int] = whole[: next(begins, 0)]

    def parsed(self, text: str) -> list[int]:
        """The text's tokens; what spells a control token becomes one. For templates."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def spells_control(self, text: str) -> bool:
        """True where a part of the text spells a control token."""
        return self._names.search(text) is not None

    def __call__(self, text: str) -> list[int]:
        """The text's tokens, all of them text."""
        ids = self.parsed(text)
        if self._not_text.isdisjoint(ids):
            return ids
        settings = {"add_special_tokens": False, "split_special_tokens": True}
        ids = list(self._tokenizer(text, **settings)["input_ids"])
        if self._not_text.isdisjoint(ids):
            return ids
        # Cut behind the first character of each spelling; behind a line end, as SentencePiece begins a text
        # with a blank.
        cuts = [0, *(found.start() + 1 for found in self._names.finditer(text)), len(text)]
        anchor = self.parsed("\n")
        ids = self.parsed(text[: cuts[1]])
        for begin, end in itertools.pairwise(cuts[1:]):
            ids += self.parsed("\n" + text[begin:end])[len(anchor) :]
        return ids
