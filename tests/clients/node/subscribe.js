// A node that is not Python's: follows a channel with what the protos say, and nothing else.
//
//   node subscribe.js --protos DIR --address HOST:PORT --channel NAME --node ID --trust KEY.pub
//                     --fingerprint HEX [--ca FILE --cert FILE --key FILE]
//
// Prints one line of JSON for each thing that happens; ends with SIGTERM.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const { parseArgs } = require("node:util");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const MANIFEST_TYPE = "application/vnd.steerage.manifest.v1+json";
const REVOCATIONS_TYPE = "application/vnd.steerage.revocations.v1+json";
const MAX_MESSAGE_BYTES = 12 << 20;
const MAX_PAYLOAD_BYTES = 1 << 30;
const DEADLINE_MS = 10_000;

const names = ["protos", "address", "channel", "node", "trust", "fingerprint", "ca", "cert", "key"];
const { values: options } = parseArgs({
  options: Object.fromEntries(names.map((name) => [name, { type: "string" }])),
});

const packages = loader.loadSync(
  ["artifact", "channel", "watch"].map((name) => `steering_service/v1/${name}.proto`),
  { includeDirs: [options.protos], keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true },
);
const v1 = grpc.loadPackageDefinition(packages).steering_service.v1;
const read = (path) => (path ? fs.readFileSync(path) : null);
const trusted = crypto.createPublicKey(read(options.trust));

const say = (event, fields) => console.log(JSON.stringify({ event, ...fields }));
const sha256 = (data) => crypto.createHash("sha256").update(data).digest("hex");

class Refusal extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

function check(good, kind, message) {
  if (!good) throw new Refusal(kind, message);
}

// What the node holds.
const PLAIN = { revision: 0, identity: sha256('{"artifact":null}') };
let active = PLAIN;
let revoked = { serial: 0, artifacts: [], keys: [], floors: {} };

// The payload of a DSSE envelope that the trusted key signed.
function opened(envelope, type) {
  check(envelope.length > 0, "unsigned", "there is no signature");
  const { payload, payloadType, signatures } = JSON.parse(envelope);
  check(payloadType === type, "signature_type", `payload type ${payloadType}`);
  const data = Buffer.from(payload, "base64");
  const signed = Buffer.concat([
    Buffer.from(`DSSEv1 ${Buffer.byteLength(type)} ${type} ${data.length} `),
    data,
  ]);
  const good = signatures.some(({ sig }) => crypto.verify(null, signed, trusted, Buffer.from(sig, "base64")));
  check(good, "signature_untrusted", "no signature by the trusted key");
  return data;
}

// Where this node stands in [0, 1); see ChannelEntry.share.
function rolloutPoint(channel, node) {
  const digest = crypto.createHash("sha256").update(`${channel}\0${node}`).digest();
  return Number(digest.readBigUInt64BE(0) >> 11n) / 2 ** 53;
}

const deadline = (bytes = 0) => new Date(Date.now() + DEADLINE_MS + bytes / 256);

function getManifest(client, digest) {
  return new Promise((resolve, reject) => {
    client.GetManifest({ digest }, { deadline: deadline() }, (error, answer) =>
      error ? reject(error) : resolve(answer),
    );
  });
}

async function download(client, digest, size) {
  const chunks = [];
  let offset = 0;
  for await (const { offset: at, chunk } of client.Download({ digest, offset: 0 }, { deadline: deadline(size) })) {
    check(at === offset && offset + chunk.length <= size, "download_chunk", `chunk at ${at}, expected at ${offset}`);
    chunks.push(chunk);
    offset += chunk.length;
  }
  return Buffer.concat(chunks);
}

// What an Assignment means; throws a Refusal for what must not run.
async function deployment(assignment, client) {
  const { channel, revision, artifact: digest, strength, enabled, share } = assignment;
  check(channel === options.channel && revision >= active.revision, "revision_order", `revision ${revision}`);
  const plain = { ...PLAIN, revision };
  if (!enabled) return plain;
  check(Number.isFinite(strength), "assignment_strength", `strength ${strength}`);
  check(share >= 0 && share <= 1, "assignment_share", `share ${share}`);
  if (!digest || rolloutPoint(channel, options.node) >= share) return plain;
  check(revision >= (revoked.floors[channel] ?? 0), "revision_revoked", `revision ${revision}`);
  check(!revoked.artifacts.includes(digest), "artifact_revoked", digest);

  const answer = await getManifest(client, digest);
  check(sha256(answer.manifest) === digest, "manifest_digest", digest);
  check(opened(answer.signature, MANIFEST_TYPE).equals(answer.manifest), "signature_payload", digest);
  const manifest = JSON.parse(answer.manifest);
  const { fingerprint } = manifest.model;
  check(fingerprint === options.fingerprint, "model_fingerprint", `made for ${fingerprint}`);
  const { min_strength, max_strength } = manifest.policy;
  check(min_strength <= strength && strength <= max_strength, "policy_strength", `strength ${strength}`);
  check(manifest.payload.size <= MAX_PAYLOAD_BYTES, "payload_size", `${manifest.payload.size} bytes`);
  const payload = await download(client, digest, manifest.payload.size);
  check(sha256(payload) === manifest.payload.sha256, "payload_digest", digest);
  // RFC 8785 writes numbers as JavaScript does, and the keys are in order.
  const positions = manifest.interventions.map((item) => [item.site, item.positions]);
  const identity = sha256(JSON.stringify({ artifact: digest, positions, strength }));
  return { revision, identity, artifact: digest, strength, bytes: payload.length };
}

function takeRevocations({ envelope }) {
  const list = JSON.parse(opened(envelope, REVOCATIONS_TYPE));
  if (list.serial <= revoked.serial) return false;
  revoked = list;
  const floor = list.floors[options.channel] ?? 0;
  const stopped = list.artifacts.includes(active.artifact) || (active.artifact && active.revision < floor);
  // At once, and with nothing active: subscribed again, it is assigned the revision, and refuses it.
  if (stopped) active = PLAIN;
  say("revoked", { serial: list.serial, stopped: Boolean(stopped) });
  return stopped;
}

async function take(assignment, clients, stream) {
  const { channel, revision, nonce } = assignment;
  const report = { channel, revision, nonce, status: "STATUS_ACK" };
  try {
    active = await deployment(assignment, clients.artifacts);
    say("ack", active);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error; // of the network: subscribe again
    Object.assign(report, { status: "STATUS_NACK", kind: error.kind, reason: error.message });
    say("nack", { revision, kind: error.kind });
  }
  stream.write({ report: { ...report, active_revision: active.revision, identity: active.identity } });
}

// One stream, until it ends. Messages wait while one is worked on, so none overtakes another; the
// service sends at most 8 Assignments ahead.
async function follow(clients) {
  const stream = clients.watches.Watch();
  const subscribe = {
    node_id: options.node,
    channel: options.channel,
    active_revision: active.revision,
    revocations_serial: revoked.serial,
    model_fingerprint: options.fingerprint,
    client: `steerage-node-js/${process.version}`,
  };
  stream.write({ subscribe });
  let timer;
  try {
    for await (const response of stream) {
      clearTimeout(timer);
      if (response.message === "heartbeat") {
        say("heartbeat", { head: response.heartbeat.head_revision });
        timer = setTimeout(() => stream.cancel(), 3 * response.heartbeat.interval_ms);
      }
      if (response.message === "revocations" && takeRevocations(response.revocations)) return;
      if (response.message === "assignment") await take(response.assignment, clients, stream);
    }
  } finally {
    clearTimeout(timer);
    stream.cancel();
  }
}

async function main() {
  const credentials = options.ca
    ? grpc.credentials.createSsl(read(options.ca), read(options.key), read(options.cert))
    : grpc.credentials.createInsecure();
  const limits = { "grpc.max_receive_message_length": MAX_MESSAGE_BYTES };
  const clients = {
    artifacts: new v1.ArtifactService(options.address, credentials, limits),
    watches: new v1.WatchService(options.address, credentials, limits),
  };
  for (let failures = 0; ; failures += 1) {
    const began = Date.now();
    try {
      await follow(clients);
    } catch (error) {
      say("interrupted", { code: grpc.status[error.code] ?? error.name, why: error.message });
    }
    if (Date.now() - began > 10_000) failures = 0;
    const delay = Math.random() * Math.min(10_000, 250 * 2 ** failures);
    await new Promise((resolve) => setTimeout(resolve, delay));
  }
}

main();
