"""The wizard: leads a person from "which machine?" to a chat with the compressed model."""
