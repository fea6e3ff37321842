"""Policies that recover prompts, and what is done where features fit no token."""
