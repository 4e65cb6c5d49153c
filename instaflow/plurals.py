"""How many, in words."""


def counted(count: int, thing: str) -> str:
    """1 shard, 1,234 shards"""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
