"""The card of a model: the README.md that says what it is, how good on what, and under whose terms."""

from segheads.card.card import model_card, write_card_of
from segheads.card.record import Record, read_record

__all__ = ["Record", "model_card", "read_record", "write_card_of"]
