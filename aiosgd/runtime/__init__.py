"""The runtime: what feeds a codec its blocks and carries its envelopes."""
