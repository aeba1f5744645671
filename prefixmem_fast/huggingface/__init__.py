"""The encoder in models of Hugging Face's transformers: `attach`, and generation that names items of a catalogue."""
