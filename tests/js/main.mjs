/**
 * node main.mjs watch --address TARGET [--from earliest|now|snapshot] [--token TOKEN] [--shard INDEX/COUNT]
 *                     [--max-batch N] [--bookmark-interval SECONDS]
 * node main.mjs hash [--counts N,N...] USER_ID...
 *
 * `watch` prints a JSON line for every message until SIGTERM. From a snapshot it also keeps a copy of the users, which is its
 * last line. Exit codes: 1 where the feed breaks its promises or refuses the request, 3 where only a snapshot helps; standard
 * error says why. `hash` prints the shard hash of each id, and its shard of each count.
 */
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { FeedError, LostPlaceError, connect, follow, shardHash } from './feed.mjs';

const PROTOS = fileURLToPath(new URL('../../protos', import.meta.url));

/** Prints a line; resolves when standard output has taken it. */
const print = (value) => new Promise((taken) => process.stdout.write(`${JSON.stringify(value)}\n`, taken));

/** The users that a stream selects, from its snapshot on. */
class Copy {
  users = new Map();
  #named = null;

  apply(message) {
    if (message.mark === 'snapshot_begin') this.#named = new Set();
    for (const event of message.events) this.#change(event);
    if (message.mark === 'snapshot_end') {
      for (const id of this.users.keys()) if (!this.#named.has(id)) this.users.delete(id);
      this.#named = null;
    }
  }

  #change({ type, user, left_filter: left, position }) {
    if ((type === 'SNAPSHOT') !== (this.#named !== null)) {
      throw new FeedError(`a ${type} event at position ${position}, ${this.#named ? 'inside' : 'outside'} of a snapshot`);
    }
    this.#named?.add(user.id);
    const known = this.users.get(user.id);
    if (known && BigInt(known.version) >= BigInt(user.version)) return;
    if (type === 'DELETED' || left) this.users.delete(user.id);
    else this.users.set(user.id, user);
  }
}

/** INDEX/COUNT as a request has it. */
function shardOf(text) {
  const [index, count] = text.split('/').map(Number);
  return { index, count };
}

function checkShard(events, { index, count }) {
  for (const { user, position } of events) {
    const found = shardHash(user.id) % count;
    if (found !== index) throw new FeedError(`the user at position ${position} is of shard ${found}/${count}: ${user.id}`);
  }
}

async function watch({ values }) {
  const start = values.token ? { resume_token: values.token } : { [values.from]: {} };
  const shard = values.shard && shardOf(values.shard);
  const copy = start.snapshot && new Copy();
  let stopped = false;
  for (const signal of ['SIGTERM', 'SIGINT']) {
    process.once(signal, async () => {
      stopped = true;
      if (copy) await print({ copy: [...copy.users.values()] });
      process.exit(0);
    });
  }
  const selection = { ...(shard && { shard }), max_batch: Number(values['max-batch']) };
  const options = { bookmarkInterval: Number(values['bookmark-interval']), log: console.error };
  const client = connect(PROTOS, values.address);
  for await (const { connection, message } of follow(client, start, selection, options)) {
    if (stopped) break;
    if (shard) checkShard(message.events, shard);
    copy?.apply(message);
    await print({ connection, ...message });
  }
}

async function hash({ values, positionals }) {
  const counts = values.counts.split(',');
  for (const id of positionals) {
    const crc32 = shardHash(id);
    await print({ id, crc32, index: Object.fromEntries(counts.map((count) => [count, crc32 % Number(count)])) });
  }
}

const COMMANDS = {
  watch: {
    run: watch,
    options: {
      address: { type: 'string', default: '127.0.0.1:50051' },
      from: { type: 'string', default: 'earliest' },
      token: { type: 'string' },
      shard: { type: 'string' },
      'max-batch': { type: 'string', default: '0' },
      'bookmark-interval': { type: 'string', default: '10' },
    },
  },
  hash: { run: hash, options: { counts: { type: 'string', default: '1' } } },
};

const [name, ...rest] = process.argv.slice(2);
const command = COMMANDS[name];
if (!command) {
  console.error(`error: ${name ?? 'no command'}: must be one of ${Object.keys(COMMANDS).join(', ')}`);
  process.exit(2);
}
try {
  await command.run(parseArgs({ args: rest, options: command.options, allowPositionals: name === 'hash' }));
} catch (error) {
  if (!(error instanceof FeedError)) throw error;
  console.error(`error: ${error.message}`);
  process.exit(error instanceof LostPlaceError ? 3 : 1);
}
