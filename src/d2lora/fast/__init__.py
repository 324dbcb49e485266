"""Fast paths: each computes what the plain path does, and is used only where that was checked.

They can be switched off: the numbers stay the same, up to rounding.
"""

from d2lora.fast.switch import Used, enabled, used_in

__all__ = ["Used", "enabled", "used_in"]
