-- Two databases that know nothing of each other. Each has an owner, as whom the migrations run, and the role of its
-- service, to which the migrations grant what it needs. Run by psql as superuser in an empty server.
\set ON_ERROR_STOP on
\getenv users_owner USERS_OWNER_PASSWORD
\getenv users USERS_PASSWORD
\getenv notifications_owner NOTIFICATIONS_OWNER_PASSWORD
\getenv notifications NOTIFICATIONS_PASSWORD
\getenv monitor MONITOR_PASSWORD

CREATE ROLE tidings_users_owner LOGIN PASSWORD :'users_owner';
CREATE ROLE tidings_users LOGIN PASSWORD :'users';
CREATE ROLE tidings_notifications_owner LOGIN PASSWORD :'notifications_owner';
CREATE ROLE tidings_notifications LOGIN PASSWORD :'notifications';

CREATE DATABASE tidings_users OWNER tidings_users_owner;
CREATE DATABASE tidings_notifications OWNER tidings_notifications_owner;
REVOKE ALL ON DATABASE postgres, tidings_users, tidings_notifications FROM PUBLIC;

-- Who watches reads statistics of the whole server, from a database in which there is nothing.
CREATE ROLE tidings_monitor LOGIN PASSWORD :'monitor' CONNECTION LIMIT 5;
GRANT CONNECT ON DATABASE postgres TO tidings_monitor;
GRANT pg_read_all_stats TO tidings_monitor;
