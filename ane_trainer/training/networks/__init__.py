"""The networks behind `ane_trainer.models.build_model`."""
