"""torch functions whose code reads values, draws inside or leaves fp16: the same in plain operations."""
