"""What tests share: a real Postgres, services as real processes, a mail catcher, and a proxy that breaks connections.

Everything here is started for real and ends with the test that asked for it, also when pytest itself is killed.
"""

from tests.harness.collector import Collector
from tests.harness.mail import MailCatcher
from tests.harness.metrics import Scrape, scrape
from tests.harness.postgres import Database, Databases, PostgresServer, migrate
from tests.harness.process import ServiceProcess, free_port, until
from tests.harness.proxy import Action, Fault, PostgresProxy, is_commit, sql_contains
from tests.harness.secrets import Authority, Callers
from tests.harness.services import Services
from tests.harness.wire import Message

__all__ = [
    "Action",
    "Authority",
    "Callers",
    "Collector",
    "Database",
    "Databases",
    "Fault",
    "MailCatcher",
    "Message",
    "PostgresProxy",
    "PostgresServer",
    "Scrape",
    "ServiceProcess",
    "Services",
    "free_port",
    "is_commit",
    "migrate",
    "scrape",
    "sql_contains",
    "until",
]
