"""Checks of this machine and of a running fleet: facts are gathered apart from judging them.

gather (looks, never judges) ──► facts ──► judge_* (judge, never gather) ──► Findings ──► text or JSON
"""
