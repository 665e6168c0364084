"""simomerge"""
