// What a load tester that knows of a server what that reflects asks of it. EXPECTED: token ids by adapter, as JSON.
import grpc from 'k6/net/grpc';
import { check } from 'k6';
import { Counter } from 'k6/metrics';

const GENERATION = 'gralora.v1.GenerationService';
const ADAPTERS = 'gralora.v1.AdapterService';
const expected = JSON.parse(__ENV.EXPECTED);
const names = Object.keys(expected);
const client = new grpc.Client();
const tried = new Counter('tried');

export const options = {
  scenarios: {
    answers: { executor: 'per-vu-iterations', vus: 4, iterations: 6, exec: 'answers' },
    lifecycle: { executor: 'per-vu-iterations', vus: 1, iterations: 3, exec: 'lifecycle' },
    leaving: { executor: 'per-vu-iterations', vus: 1, iterations: 3, exec: 'leaving' },
  },
  thresholds: {
    checks: ['rate==1'],
    'tried{kind:answer at once}': ['count==24'],
    'tried{kind:answer in pieces}': ['count==24'],
    'tried{kind:unknown adapter}': ['count==24'],
    'tried{kind:lifecycle}': ['count==9'],
    'tried{kind:left in the middle}': ['count==3'],
  },
};

function expect(kind, isSo) {
  tried.add(1, { kind });
  check(isSo, { [kind]: (found) => found });
}

function connect() {
  client.connect(__ENV.ADDRESS, { plaintext: true, reflect: true });
}

function asked(adapter, maxTokens) {
  return { text: 'hello', adapter, sampling: { temperature: 0 }, stopping: { max_tokens: maxTokens, ignore_eos: true } };
}

function isExpected(adapter, tokens) {
  return JSON.stringify(tokens) === JSON.stringify(expected[adapter]);
}

export function answers() {
  connect();
  const adapter = names[(__VU + __ITER) % names.length];
  const one = client.invoke(`${GENERATION}/Generate`, asked(adapter, 8));
  expect('answer at once', one.status === grpc.StatusOK && isExpected(adapter, one.message.tokenIds));
  const absent = client.invoke(`${GENERATION}/Generate`, asked('nobody', 8));
  expect('unknown adapter', absent.status === grpc.StatusNotFound);

  const stream = new grpc.Stream(client, `${GENERATION}/StreamGenerate`);
  const tokens = [];
  stream.on('data', (message) => tokens.push(...message.tokenIds));
  stream.on('end', () => {
    expect('answer in pieces', isExpected(adapter, tokens));
    client.close();
  });
  stream.write(asked(adapter, 8));
  stream.end();
}

export function lifecycle() {
  connect();
  const adapter = names[0] + '-of-k6';
  const loaded = client.invoke(`${ADAPTERS}/LoadAdapter`, { name: adapter, path: __ENV.FOLDER });
  expect('lifecycle', loaded.status === grpc.StatusOK);
  const answer = client.invoke(`${GENERATION}/Generate`, asked(adapter, 8));
  expect('lifecycle', isExpected(names[0], answer.message.tokenIds));
  const unloaded = client.invoke(`${ADAPTERS}/UnloadAdapter`, { name: adapter });
  expect('lifecycle', unloaded.status === grpc.StatusOK);
  client.close();
}

// Its connection is closed in the middle of an answer. Whether the server noticed, the test beside asks it.
export function leaving() {
  connect();
  const stream = new grpc.Stream(client, `${GENERATION}/StreamGenerate`);
  let hasLeft = false;
  stream.on('error', () => {});
  stream.on('data', (message) => {
    if (hasLeft) return;
    hasLeft = true;
    expect('left in the middle', !message.finished);
    client.close();
  });
  stream.write(asked(names[1], 400));
  stream.end();
}
