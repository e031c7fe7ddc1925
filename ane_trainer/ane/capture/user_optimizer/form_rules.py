"""All rules for the operations of a user's optimizer on forms: importing this file fills the table."""

from __future__ import annotations

from ane_trainer.ane.capture.user_optimizer import form_choices, form_products, form_sums
from ane_trainer.ane.capture.user_optimizer.form_registry import RULES, Value, constant

__all__ = ["RULES", "Value", "constant", "form_choices", "form_products", "form_sums"]
