"""Queries and where they come from: synthetic worlds of facts, facts in natural language, invented people.

Everything here is tokens and spans. How a model answers a query does not belong here.
"""
