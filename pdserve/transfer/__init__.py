"""How KV bytes travel between workers. So far: what NIXL needs to behave on shared cores."""
