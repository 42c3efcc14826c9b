"""The step `portable`: the same model in the portable form, with every option off."""

from typing import Literal

from reattend.convert.portable.step import PortableStep


class Portable(PortableStep):
    """Write a model in the portable form. Logits stay what they were, to the bit."""

    step: Literal["portable"] = "portable"
