"""What a person sees: sessions, the prompt, what is drawn."""
