"""The KV cache: how keys and values are coded, stored, and met by the queries."""
