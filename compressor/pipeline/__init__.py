"""The stages of a run in order, each done once and resumed where it stopped.

The only part of ``compressor`` that knows every stage: a stage gets values, not the pipeline. ``run``
executes, ``plan`` looks ahead, ``replanning`` picks again from the ledger.
"""
