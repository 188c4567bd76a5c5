"""The least that onecard.data asks of a tokenizer, in plain Python: a token per UTF-8 byte and two special ones."""

from __future__ import annotations

import re


class PlainTokenizer:
    """Ids 0 and 1 are <s> and </s>; a byte b is id b + 2."""

    bos_token, eos_token = "<s>", "</s>"
    bos_token_id, eos_token_id = 0, 1
    all_special_tokens = ("<s>", "</s>")
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012
    chat_template = None

    def __call__(
        self, texts: list[str], *, add_special_tokens: bool, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * add_special_tokens + self._ids(text) for text in texts]}

    def decode(self, ids: list[int], **_: object) -> str:
        pieces = [b"<s>" if i == 0 else b"</s>" if i == 1 else bytes([i - 2]) for i in ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 0, "</s>": 1, **{f"<0x{b:02X}>": b + 2 for b in range(256)}}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split("(</?s>)", text):
            ids += (
                [self.all_special_tokens.index(piece)]
                if piece in self.all_special_tokens
                else [byte + 2 for byte in piece.encode("utf-8")]
            )
        return ids
