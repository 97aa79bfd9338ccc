"""Text to tokens and back, one token at a time where text is streamed."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import DecodeStream

from compressor.errors import PackageError
from serve.errors import bad_request


class Tokenizer:
    """The package's ``tokenizer.json``. Raises ``PackageError`` if it has none that can be read."""

    def __init__(self, path: Path) -> None:
        try:
            self._backend = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:
            raise PackageError(f"{path} is not a tokenizer ({error}): make the package again") from None
        self.path = path
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def size(self) -> int:
        return int(self._backend.get_vocab_size())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Raises ``ApiError`` for text that is not Unicode (lone surrogates)."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise bad_request(
                "the text holds a lone surrogate, which is not valid Unicode: remove it"
            ) from None
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def stream(self) -> TextStream:
        return TextStream(self._backend)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; of part of a character too."""
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return self.decode([token], skip_special_tokens=False).encode()


class TextStream:
    """Turns tokens into text as they come; characters split over tokens wait for their last byte."""

    def __init__(self, backend: HuggingFaceTokenizer) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty where a character is still incomplete."""
        self._ids.append(token)
        piece = self._stream.step(self._backend, token) or ""
        self._length += len(piece)
        return piece

    def flush(self) -> str:
        """What is left when no token follows: an incomplete character, as the replacement character."""
        whole = str(self._backend.decode(self._ids, skip_special_tokens=True))
        return whole[self._length :]


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE's printable stand-in for each byte (Radford et al. 2019, GPT-2's encoder)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
