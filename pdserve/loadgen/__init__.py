"""Load on a service from outside: what ``pdserve bench`` sends, and what it saw come back."""
