"""The state document (``GET /pdserve/state``) as typed structs, and what in it needs an operator."""
