"""The calendar of an RTC: seconds since the year 1, and the registers that show them."""

from collections.abc import Sequence
from datetime import date

MINUTE, HOUR, DAY = 60, 3600, 86400
_DAYS = date.max.toordinal()  # behind the end of the year 9999 the year 1 begins
SPAN = _DAYS * DAY
UNIX_EPOCH = (date(1970, 1, 1).toordinal() - 1) * DAY

# The order of the fields here.
SECONDS, MINUTES, HOURS, WEEKDAY, DAY_OF_MONTH, MONTH, YEAR, CENTURY = range(8)
PM = 1 << 7  # of the hours register in 12-hour mode


class Format:
    """How numbers stand in the registers: BCD or binary, 24 or 12 hours."""

    __slots__ = ("binary", "full_day")

    def __init__(self, binary: bool, full_day: bool) -> None:
        self.binary = binary
        self.full_day = full_day

    def encode(self, number: int) -> int:
        return number if self.binary else number // 10 << 4 | number % 10

    def decode(self, register: int) -> int:
        """What no number of this format is comes out as some number up to 255."""
        return register if self.binary else (register >> 4) * 10 + (register & 0xF)

    def encode_hour(self, hour: int) -> int:
        if self.full_day:
            return self.encode(hour)
        return self.encode(hour % 12 or 12) | (PM if hour >= 12 else 0)

    def decode_hour(self, register: int) -> int:
        """The hour; above 23 for what is none."""
        if self.full_day:
            return self.decode(register)
        hour = self.decode(register & ~PM)
        if not 1 <= hour <= 12:
            return 255
        return hour % 12 + (12 if register & PM else 0)


def fields(seconds: int, weekday_shift: int, form: Format) -> list[int]:
    """The eight registers for `seconds` below SPAN.

    Sunday is day 1; `weekday_shift` says how far the guest's reckoning is off.
    """
    days, rest = divmod(seconds, DAY)
    day = date.fromordinal(days + 1)
    weekday = (day.isoweekday() + weekday_shift) % 7 + 1
    numbers = (rest % MINUTE, rest // MINUTE % 60, 0, weekday, day.day, day.month,
               day.year % 100, day.year // 100)  # fmt: skip
    registers = [form.encode(number) for number in numbers]
    registers[HOURS] = form.encode_hour(rest // HOUR)
    return registers


def seconds_of(registers: Sequence[int], form: Format) -> tuple[int, int]:
    """The seconds, and the shift of the weekday. A field that cannot be gets its nearest value."""
    numbers = [form.decode(register) for register in registers]
    year = min(max(numbers[CENTURY] * 100 + min(numbers[YEAR], 99), 1), date.max.year)
    month = min(max(numbers[MONTH], 1), 12)
    day_of_month = min(max(numbers[DAY_OF_MONTH], 1), _days_in(year, month))
    day = date(year, month, day_of_month)
    hour = min(form.decode_hour(registers[HOURS]), 23)
    seconds = hour * HOUR + min(numbers[MINUTES], 59) * MINUTE + min(numbers[SECONDS], 59)
    shift = (numbers[WEEKDAY] - 1 - day.isoweekday()) % 7
    return (day.toordinal() - 1) * DAY + seconds, shift


def _days_in(year: int, month: int) -> int:
    if month == 12:
        return 31
    return (date(year, month + 1, 1) - date(year, month, 1)).days


def next_alarm(after: int, alarm: Sequence[int | None]) -> int | None:
    """The first second behind `after` at which seconds, minutes and hours are those of `alarm`.

    None in it is any value. There may be no such second.
    """
    second, minute, hour = alarm
    at = after + 1
    for _ in range(6):  # to the right second, minute, hour, and again down to the second
        if hour is not None and at // HOUR % 24 != hour:
            at = at // HOUR * HOUR + (hour - at // HOUR) % 24 * HOUR
        elif minute is not None and at // MINUTE % 60 != minute:
            at = at // MINUTE * MINUTE + (minute - at // MINUTE) % 60 * MINUTE
        elif second is not None and at % MINUTE != second:
            at += (second - at) % MINUTE
        else:
            return at
    return None
