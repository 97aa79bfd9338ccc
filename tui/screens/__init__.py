"""One file a step, and one for the dialogs."""
