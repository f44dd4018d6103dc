"""Who is alive in which role: membership, leases, and SGLang's bootstrap protocol."""
