/**
 * Follows WatchUsers by nothing but protos/ and docs/protocol.md.
 *
 * What always holds:
 * - A place, a token and its position, is remembered when the next message is asked for, that is after the last one was
 *   processed. A connection that ends in between, or inside an atomic group, is followed by one that begins at that place:
 *   what was passed without a token comes again.
 * - Each message begins where the one before it ended, also over a reconnect; anything else is a FeedError.
 * - Positions are 64-bit: they come as strings and are compared as BigInt, never as numbers.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const FIRST_BACKOFF = 250;
const LONGEST_BACKOFF = 10_000;

/** Bookmark intervals without a message after which a connection is dead. */
const SILENT_INTERVALS = 3;

const { status } = grpc;

/** The place is lost: only a snapshot helps. */
const LOST_PLACE = new Set([status.OUT_OF_RANGE, status.FAILED_PRECONDITION]);

/** The same request would be refused again. */
const REFUSED = new Set([
  status.INVALID_ARGUMENT,
  status.NOT_FOUND,
  status.PERMISSION_DENIED,
  status.UNAUTHENTICATED,
  status.UNIMPLEMENTED,
]);

/** The feed cannot go on, and reconnecting would not help. */
export class FeedError extends Error {}

/** The feed cannot go on where it was: a copy must be built anew, from a snapshot. */
export class LostPlaceError extends FeedError {}

const CRC_TABLE = Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** The CRC-32 of the 16 bytes of a user's id, as zlib has it: 0 to 2^32 - 1. */
export function shardHash(userId) {
  const bytes = Buffer.from(userId.replaceAll('-', ''), 'hex');
  if (bytes.length !== 16) throw new TypeError(`not a user's id: ${userId}`);
  return (bytes.reduce((crc, byte) => CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8), ~0) ^ ~0) >>> 0;
}

/** A client of the user service. `protos` is the folder of the .proto files, `target` an address as gRPC names it. */
export function connect(protos, target) {
  const loaded = loadSync('tidings/users/v1/users.proto', {
    includeDirs: [protos],
    keepCase: true,
    longs: String,
    enums: String,
    defaults: true,
    oneofs: true,
  });
  const { UserService } = grpc.loadPackageDefinition(loaded).tidings.users.v1;
  return new UserService(target, grpc.credentials.createInsecure());
}

/** Checks the messages of one connection. `position` is where it must begin; null if only a token is known. */
class Chain {
  #begun = false;
  #position;
  #dense;

  constructor(position, dense) {
    this.#position = position;
    this.#dense = dense;
  }

  take(message) {
    const [from, to] = [BigInt(message.previous_position), BigInt(message.position)];
    if (!this.#begun && !(message.mark === 'bookmark' && message.resume_token)) {
      throw new FeedError('the first message is no bookmark with a token');
    }
    if (this.#position !== null && from !== this.#position) {
      throw gap('the previous_position of a message', this.#position, from);
    }
    let last = from;
    for (const event of message.events) {
      const position = BigInt(event.position);
      const next = event.type === 'SNAPSHOT' ? from : last + 1n;
      // With a filter or a shard, events that are left out lie between those that are sent.
      const skips = !this.#dense && event.type !== 'SNAPSHOT' && position > next;
      if (position !== next && !skips) throw gap('the position of an event', next, position);
      last = position;
    }
    // What is passed without being sent: by a selection, or by a snapshot that makes it needless.
    const passes = (!this.#dense || message.mark === 'snapshot_begin') && to > last;
    if (to !== last && !passes) throw gap('the position of a message', last, to);
    this.#begun = true;
    this.#position = to;
  }
}

function gap(what, expected, got) {
  return new FeedError(`gap: ${what} is ${got}, expected ${expected}`);
}

/**
 * Yields { connection, message } without an end; connections count from 1. `start` is the start of a WatchUsersRequest,
 * for instance { earliest: {} } or { resume_token }, and `selection` its other fields. `bookmarkInterval` is in seconds;
 * `log` is told why it connects again. Throws a FeedError where reconnecting would not help.
 */
export async function* follow(client, start, selection, { bookmarkInterval, log }) {
  const dense = !selection.shard && !selection.filter;
  const nanoseconds = Math.round(bookmarkInterval * 1e9);
  const bookmark_interval = { seconds: Math.floor(nanoseconds / 1e9), nanos: nanoseconds % 1e9 };
  let place = { start, position: null };
  for (let connection = 1, failures = 0; ; connection += 1, failures += 1) {
    const call = client.WatchUsers({ ...selection, ...place.start, bookmark_interval });
    // The end of a call that was left is nobody's business.
    call.on('error', () => {});
    let silent = false;
    const watch = () =>
      setTimeout(() => {
        silent = true;
        call.cancel();
      }, SILENT_INTERVALS * bookmarkInterval * 1000);
    const chain = new Chain(place.position, dense);
    let end = { reason: 'the server ended the stream', wait: 0 };
    // It runs only while a message is waited for: processing one may take its time.
    let watchdog = watch();
    try {
      for await (const message of call) {
        clearTimeout(watchdog);
        chain.take(message);
        yield { connection, message };
        const { resume_token, position } = message;
        if (resume_token) place = { start: { resume_token }, position: BigInt(position) };
        if (message.events.length > 0) failures = 0;
        if (message.mark === 'drain') {
          end = { reason: `drain: ${message.drain.reason}`, wait: milliseconds(message.drain.reconnect_after) };
          break;
        }
        watchdog = watch();
      }
    } catch (error) {
      if (error instanceof FeedError || error.code === undefined) throw error;
      if (LOST_PLACE.has(error.code)) throw new LostPlaceError(error.message);
      if (REFUSED.has(error.code)) throw new FeedError(error.message);
      const reason = silent ? `no message for ${SILENT_INTERVALS} bookmark intervals` : error.message;
      end = { reason, wait: 0 };
    } finally {
      clearTimeout(watchdog);
      call.cancel();
    }
    const delay = end.wait + Math.random() * Math.min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** failures);
    log(`${end.reason}; connecting again in ${Math.round(delay)} ms`);
    await sleep(delay);
  }
}

function milliseconds(duration) {
  return duration ? Number(duration.seconds) * 1000 + duration.nanos / 1e6 : 0;
}
