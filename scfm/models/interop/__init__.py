"""Readers and writers of published checkpoints, a file a family."""
