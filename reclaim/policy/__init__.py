"""Policies, which select the pages to evict, behind one protocol."""
