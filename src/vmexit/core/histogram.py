"""Times in buckets of logarithmic width: their median, in memory that does not grow."""

# Four buckets to each doubling: what is read back is at most an eighth off.
_PART_BITS = 2
_PARTS = 1 << _PART_BITS
_OCTAVES = 40  # 2⁴⁰ ns are 18 minutes: what took longer is counted there

BUCKETS = _OCTAVES << _PART_BITS


def bucket_of(nanoseconds: int) -> int:
    """The bucket of a time of 0 or more."""
    octave = nanoseconds.bit_length() - 1 - _PART_BITS
    if octave < 0:
        return nanoseconds  # below _PARTS: each its own
    bucket = (octave << _PART_BITS) + (nanoseconds >> octave)
    return bucket if bucket < BUCKETS else BUCKETS - 1


def middle_of(bucket: int) -> int:
    """The time in the middle of a bucket, in nanoseconds."""
    octave = (bucket >> _PART_BITS) - 1
    if octave < 0:
        return bucket
    low = (bucket - (octave << _PART_BITS)) << octave
    return low + (1 << octave) // 2


def median(counts: "tuple[int, ...] | list[int]") -> int:
    """The median of times counted by bucket, in nanoseconds; 0 where there are none."""
    half = (sum(counts) + 1) // 2
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= half:
            return middle_of(bucket)
    return 0
