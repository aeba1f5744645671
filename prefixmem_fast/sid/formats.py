"""How a code is written as a token: templates met in the field, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_FIELDS = {
    "letter": "(?P<letter>[a-z])",
    "level": "(?P<level>[0-9]+)",
    "level0": "(?P<level0>[0-9]+)",
    "code": "(?P<code>[0-9]+)",
    "number": "(?P<number>[0-9]+)",
}
KNOWN_FORMATS = (
    "<{letter}_{code}>",  # LC-Rec, LETTER, MiniOneRec
    "<s_{letter}_{code}>",
    "<C{level0}_{code}>",
    "<item_L{level0}_C{code}>",
    "<|sid_{number}|>",
)


class TokenFormat:
    """A template with one field for the level and one for the code, or with one number for both.

    Fields: ``{letter}`` is the level as a, b, c; ``{level}`` counts it from 1 and ``{level0}`` from 0; ``{code}``
    counts from 0; ``{number}`` is the code plus the sizes of the codebooks of the levels before.

    Args:
        template: one of `KNOWN_FORMATS`, or any other with these fields.
        codebook_sizes: K_1 .. K_L; needed where the template has ``{number}``.

    Raises:
        TypeError, ValueError: the template's fields do not say a level and a code.
    """

    def __init__(self, template: str, codebook_sizes: Sequence[int] | None = None) -> None:
        if not isinstance(template, str):
            raise TypeError(
                f"token_format = {template!r} is a {type(template).__name__}; give a template such as "
                f"{KNOWN_FORMATS[0]!r}"
            )
        parts = re.split(r"\{(\w+)\}", template)  # text and field names in turn
        fields = sorted(parts[1::2])
        if fields not in (["code", "letter"], ["code", "level"], ["code", "level0"], ["number"]):
            raise ValueError(
                f"token_format = {template!r} has the fields {fields}; give {{code}} with one of {{letter}}, "
                f"{{level}}, {{level0}}, or {{number}} alone, as in {', '.join(KNOWN_FORMATS)}"
            )
        if fields == ["number"] and codebook_sizes is None:
            raise ValueError(f"token_format = {template!r} numbers all levels in one row; give codebook_sizes too")
        self.template = template
        self.codebook_sizes = None if codebook_sizes is None else tuple(codebook_sizes)
        pattern = "".join(_FIELDS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
        self._pattern = re.compile(pattern)

    def write(self, level: int, code: int) -> str:
        """The token of a code; levels count from 1.

        Raises:
            ValueError: the level has no letter.
        """
        if level > 26 and "{letter}" in self.template:
            raise ValueError(f"token_format = {self.template!r} has no letter for level {level}; use {{level}}")
        number = code + sum(self.codebook_sizes[: level - 1]) if self.codebook_sizes else code
        return self.template.format(
            letter=chr(ord("a") + level - 1), level=level, level0=level - 1, code=code, number=number
        )

    def read(self, token: str) -> tuple[int, int] | None:
        """(level, code) of a token, None where it is not of this format."""
        match = self._pattern.fullmatch(token)
        if match is None:
            return None
        fields = match.groupdict()
        if "number" in fields:
            return self._split(int(fields["number"]))
        if "letter" in fields:
            level = ord(fields["letter"]) - ord("a") + 1
        else:
            level = int(fields["level"]) if "level" in fields else int(fields["level0"]) + 1
        return level, int(fields["code"])

    def _split(self, number: int) -> tuple[int, int] | None:
        for level, size in enumerate(self.codebook_sizes, start=1):
            if number < size:
                return level, number
            number -= size
        return None


def recognise(tokens: Iterable[str], codebook_sizes: Sequence[int] | None) -> TokenFormat:
    """The one known format that some of `tokens` have.

    Raises:
        ValueError: none has one, or two formats are there.
    """
    tokens = list(tokens)
    examples = {}
    for template in KNOWN_FORMATS:
        if "{number}" in template and codebook_sizes is None:
            continue
        form = TokenFormat(template, codebook_sizes)
        example = next((token for token in tokens if form.read(token)), None)
        if example is not None:
            examples[form] = example
    if len(examples) == 1:
        return next(iter(examples))
    if not examples:
        raise ValueError(
            f"none of the {len(tokens)} tokens is a Semantic ID token of a known format ({', '.join(KNOWN_FORMATS)}; "
            "the last one needs codebook_sizes); give token_format, or add tokens with SIDVocabulary.extend"
        )
    listed = ", ".join(f"{form.template} ({example})" for form, example in examples.items())
    raise ValueError(f"the tokens have several formats: {listed}; give token_format")
