"""Text to tokens and back, one token at a time where text is streamed."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: threads would only cost

from tokenizers import Encoding
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import DecodeStream

from compressor.errors import PackageError
from serve.errors import ApiError, bad_request


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

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Token ids of ``text``; other threads go on meanwhile.

        Raises ``ApiError`` for text that is not Unicode (lone surrogates), and for more than ``most`` tokens,
        which is found out early: of text far too long only the beginning is looked at.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise bad_request(
                "the text holds a lone surrogate, which is not valid Unicode: remove it"
            ) from None
        length = 2 * most if most else len(text)
        while length < len(text):
            if most and len(self._encode(text[:length], add_special_tokens)) > most + most // 8 + 64:
                raise _too_long(most)  # the rest could take back a few of these tokens, at the cut
            length *= 2
        encoding = self._encode(text, add_special_tokens)
        if most and len(encoding) > most:
            raise _too_long(most, len(encoding))
        return list(encoding.ids)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens; other threads go on meanwhile."""
        (text,) = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding

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


def _too_long(most: int, tokens: int | None = None) -> ApiError:
    has = f"more than {most}" if tokens is None else tokens
    return bad_request(
        f"the text has {has} tokens and at most {most} fit: shorten it", code="context_length_exceeded"
    )


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
        (whole,) = self._backend.decode_batch([self._ids], skip_special_tokens=True)
        return str(whole)[self._length :]


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
