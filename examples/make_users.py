#!/usr/bin/env python3
"""Writes a CSV of users to import: `python examples/make_users.py --count 10000 > users.csv`.

Names come in ten scripts, usernames and emails are unique, addresses are of domains that nobody can own. The same seed
gives the same file. With `--bad N`, N lines are wrong in different ways, and their numbers (the header is line 1) and
reasons are listed on standard error or in a file. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

HEADER = ("username", "email", "display_name", "locale", "time_zone", "labels.team")
TEAMS = ("engineering", "support", "sales", "finance", "design", "research", "operations", "people")
DOMAINS = ("example.com", "example.org", "example.net", "mail.example.com", "staff.example.org")


@dataclass(frozen=True)
class Script:
    """Names of one script, each as `native=romanized`; `shape` puts them together as the language does."""

    locales: tuple[tuple[str, str], ...]
    given: str
    family: str
    shape: str = "{given} {family}"
    domain: str = ""


SCRIPTS = (
    Script(
        (("de-CH", "Europe/Zurich"), ("sv-SE", "Europe/Stockholm"), ("cs-CZ", "Europe/Prague"),
         ("vi-VN", "Asia/Ho_Chi_Minh"), ("pt-BR", "America/Sao_Paulo"), ("pl-PL", "Europe/Warsaw"),
         ("is-IS", "Atlantic/Reykjavik"), ("fr-CA", "America/Toronto")),
        "Zoë=zoe Jürg=juerg Åsa=asa Łukasz=lukasz Chloé=chloe José=jose Šárka=sarka Þóra=thora "
        "Nguyệt=nguyet João=joao Gülşen=gulsen Ioana=ioana",
        "Ångström=angstrom Müller=mueller Dvořák=dvorak Wójcik=wojcik Guðmundsdóttir=gudmundsdottir "
        "Gonçalves=goncalves "
        "Nuñez=nunez Lefèvre=lefevre Trần=tran Çelik=celik Sørensen=sorensen Kovács=kovacs",
        domain="bücher.example.com",
    ),
    Script(
        (("el-GR", "Europe/Athens"), ("el-CY", "Asia/Nicosia")),
        "Ελένη=eleni Γιώργος=giorgos Μαρία=maria Νίκος=nikos Αικατερίνη=aikaterini Δημήτρης=dimitris "
        "Σοφία=sofia Παναγιώτης=panagiotis",
        "Παπαδόπουλος=papadopoulos Γεωργίου=georgiou Οικονόμου=oikonomou Νικολάου=nikolaou "
        "Βασιλείου=vasileiou Αγγελίδης=angelidis "
        "Μακρής=makris Ιωάννου=ioannou",
        domain="ταχυδρομείο.example.org",
    ),
    Script(
        (("ru-RU", "Europe/Moscow"), ("uk-UA", "Europe/Kyiv"), ("bg-BG", "Europe/Sofia"), ("kk-KZ", "Asia/Almaty")),
        "Юлия=yuliya Олексій=oleksii Мария=mariya Дмитрий=dmitriy Щастя=shchastia Айгүл=aigul "
        "Катерина=kateryna Борис=boris",
        "Щербак=shcherbak Шевченко=shevchenko Иванов=ivanov Ковальчук=kovalchuk Георгиев=georgiev "
        "Нұрлан=nurlan Соловьёв=solovyov "
        "Їжак=yizhak",
        domain="почта.example.com",
    ),
    Script(
        (("ar-EG", "Africa/Cairo"), ("ar-TN", "Africa/Tunis"), ("fa-IR", "Asia/Tehran"), ("ur-PK", "Asia/Karachi")),
        "ليلى=layla محمد=mohammed فاطمة=fatima يوسف=yusuf نور=nour آرش=arash مریم=maryam خالد=khalid",
        "حسن=hassan الفارسي=alfarisi بن‌علي=benali رضایی=rezaei منصور=mansour خان=khan النجار=alnajjar "
        "صالح=saleh",
        domain="بريد.example.net",
    ),
    Script(
        (("he-IL", "Asia/Jerusalem"),),
        "נועה=noa יוסף=yosef תמר=tamar איתי=itai שירה=shira דוד=david מיכל=michal אורי=uri",
        "כהן=cohen לוי=levi מזרחי=mizrahi פרץ=peretz ביטון=biton אברהם=avraham פרידמן=friedman שפירא=shapira",
    ),
    Script(
        (("hi-IN", "Asia/Kolkata"), ("mr-IN", "Asia/Kolkata"), ("ne-NP", "Asia/Kathmandu")),
        "आरव=aarav प्रिया=priya कृष्ण=krishna अनुष्का=anushka लक्ष्मी=lakshmi विवेक=vivek ज्योति=jyoti "
        "सिद्धार्थ=siddharth",
        "शर्मा=sharma कुलकर्णी=kulkarni श्रेष्ठ=shrestha वर्मा=verma मिश्रा=mishra जोशी=joshi "
        "गुप्ता=gupta चतुर्वेदी=chaturvedi",
        domain="डाक.example.org",
    ),
    Script(
        (("zh-Hans-CN", "Asia/Shanghai"), ("zh-Hant-TW", "Asia/Taipei"), ("zh-Hans-SG", "Asia/Singapore")),
        "伟=wei 芳=fang 秀英=xiuying 敏=min 静怡=jingyi 子轩=zixuan 雨桐=yutong 俊傑=junjie",
        "王=wang 李=li 張=zhang 欧阳=ouyang 陳=chen 刘=liu 黃=huang 赵=zhao",
        "{family}{given}",
        domain="邮件.example.com",
    ),
    Script(
        (("ja-JP", "Asia/Tokyo"),),
        "さくら=sakura ひまり=himari ハルト=haruto アオイ=aoi ゆうと=yuto ミユ=miyu りく=riku メイ=mei",
        "さとう=sato スズキ=suzuki たかはし=takahashi タナカ=tanaka わたなべ=watanabe "
        "イトウ=ito やまもと=yamamoto ナカムラ=nakamura",
        "{family} {given}",
        domain="メール.example.net",
    ),
    Script(
        (("ko-KR", "Asia/Seoul"),),
        "서연=seoyeon 민준=minjun 지우=jiwoo 하은=haeun 도윤=doyun 예준=yejun 수아=sua 현우=hyunwoo",
        "김=kim 이=lee 박=park 최=choi 정=jeong 강=kang 윤=yoon 남궁=namgung",
        "{family}{given}",
        domain="우편.example.org",
    ),
    Script(
        (("th-TH", "Asia/Bangkok"),),
        "สมชาย=somchai สุดา=suda กิตติ=kitti พิมพ์ชนก=pimchanok ณัฐ=nat อรุณี=arunee ธนวัฒน์=thanawat "
        "มาลี=malee",
        "ใจดี=jaidee ศรีสุข=srisuk วงศ์สวัสดิ์=wongsawat รัตนากร=rattanakorn บุญมี=boonmee "
        "แสงทอง=saengthong ทองดี=thongdee ชัยวัฒน์=chaiwat",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class User:
    """One good line."""

    username: str
    email: str
    display_name: str
    locale: str
    time_zone: str
    team: str

    def cells(self) -> list[str]:
        """In the order of the header."""
        return [self.username, self.email, self.display_name, self.locale, self.time_zone, self.team]


def _names(text: str) -> list[tuple[str, str]]:
    return [(native, romanized) for native, _, romanized in (word.partition("=") for word in text.split())]


def make_user(rng: random.Random, taken: set[str]) -> User:
    """A user whose username is not in `taken`, and is added to it."""
    script = rng.choice(SCRIPTS)
    given, latin_given = rng.choice(_names(script.given))
    family, latin_family = rng.choice(_names(script.family))
    locale, time_zone = rng.choice(script.locales)
    stem = rng.choice(("{0}.{1}", "{0}_{1}", "{0}-{1}", "{2}{1}")).format(latin_given, latin_family, latin_given[0])
    username = next(
        name for name in itertools.chain([stem], (f"{stem}{n}" for n in itertools.count(2))) if name not in taken
    )
    taken.add(username)
    domain = script.domain if script.domain and rng.random() < 0.05 else rng.choice(DOMAINS)
    display_name = script.shape.format(given=given, family=family)
    return User(username, f"{username}@{domain}", display_name, locale, time_zone, rng.choice(TEAMS))


def _upper_local_part(email: str) -> str:
    local, _, domain = email.partition("@")
    return f"{local.upper()}@{domain}"


# What is wrong, and how to make a good line (and an earlier good line) wrong in that way.
FLAWS: tuple[tuple[str, Callable[[User, User], list[str]]], ...] = (
    ("email is missing", lambda user, _: replace(user, email="").cells()),
    ("username has a blank", lambda user, _: replace(user, username=f"{user.username} jr").cells()),
    ("username is in upper case", lambda user, _: replace(user, username=user.username.upper()).cells()),
    ("username is that of an earlier line", lambda user, earlier: replace(user, username=earlier.username).cells()),
    ("email is that of an earlier line", lambda user, earlier: replace(user, email=earlier.email).cells()),
    ("time zone does not exist", lambda user, _: replace(user, time_zone="Europe/Atlantis").cells()),
    ("locale is not BCP 47", lambda user, _: replace(user, locale="deutsch_CH!").cells()),
    ("display name is longer than 256 characters", lambda user, _: replace(user, display_name="長" * 257).cells()),
    ("a cell is missing", lambda user, _: user.cells()[:-1]),
    ("there is a cell too many", lambda user, _: [*user.cells(), "surplus"]),
    ("email has no domain", lambda user, _: replace(user, email=f"{user.username}@").cells()),
    ("email has two @", lambda user, _: replace(user, email=f"{user.username}@@example.com").cells()),
    ("username is missing", lambda user, _: replace(user, username="").cells()),
    ("username is longer than 64 characters", lambda user, _: replace(user, username="x" * 65).cells()),
    ("username is not in ASCII", lambda user, _: replace(user, username=f"{user.username}é").cells()),
    ("label is longer than 256 bytes", lambda user, _: replace(user, team="t" * 257).cells()),
    ("email has a blank", lambda user, _: replace(user, email=f"a {user.email}").cells()),
    ("email is that of an earlier line in other case", lambda user, earlier: replace(
        user, email=_upper_local_part(earlier.email)).cells()),
    ("time zone is an abbreviation that is none", lambda user, _: replace(user, time_zone="MESZ").cells()),
    ("display name has a control character", lambda user, _: replace(user, display_name="a\x07b").cells()),
)  # fmt: skip


def make_lines(count: int, bad: int, seed: int) -> tuple[list[list[str]], list[tuple[int, str]]]:
    """The lines after the header, and (line number, reason) of the bad ones."""
    rng = random.Random(seed)
    taken: set[str] = set()
    users = [make_user(rng, taken) for _ in range(count)]
    # The first line is good, so that there is an earlier one to repeat.
    places = sorted(rng.sample(range(1, count), bad))
    lines = [user.cells() for user in users]
    listed = []
    for place, (reason, spoil) in zip(places, itertools.cycle(FLAWS), strict=False):
        earlier = rng.choice([index for index in range(place) if index not in places])
        lines[place] = spoil(users[place], users[earlier])
        listed.append((place + 2, reason))
    return lines, listed


def main() -> int:
    """Writes the file. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="lines after the header [10000]")
    parser.add_argument("--bad", type=int, default=0, help="how many of them are bad [0]")
    parser.add_argument("--bad-list", type=Path, help="file for the list of bad lines [standard error]")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other names [1]")
    parser.add_argument("--output", type=Path, help="file to write [standard output]")
    arguments = parser.parse_args()
    if arguments.count < 1 or not 0 <= arguments.bad < arguments.count:
        parser.error("--count must be at least 1 and --bad less than it")
    lines, bad = make_lines(arguments.count, arguments.bad, arguments.seed)
    # Standard output too is written as UTF-8 and with plain line ends, whatever the locale.
    with open(arguments.output or sys.stdout.fileno(), "w", encoding="utf-8", newline="") as output:  # noqa: PTH123
        writer = csv.writer(output, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(lines)
    listing = "".join(f"{number}: {reason}\n" for number, reason in bad)
    if arguments.bad_list:
        arguments.bad_list.write_text(listing, encoding="utf-8")
    else:
        sys.stderr.write(listing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
