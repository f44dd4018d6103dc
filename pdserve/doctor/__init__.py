"""Checks of this machine and of a running fleet: facts are gathered apart from judging them.

gather (looks, never judges) ──► facts ──► checks (health, never look) ──► Findings ──► text or JSON
"""
