// Results kept in this browser: an IndexedDB store, newest first, limited in number and bytes.

const MAX_RESULTS = 100, MAX_BYTES = 512 * 1024 * 1024;
const STORE = "results";

let opened = null;
const inMemory = new Map();  // where the browser has no IndexedDB (some private windows)

function open() {
  opened ||= new Promise((resolve, reject) => {
    const request = indexedDB.open("ovserve", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, {keyPath: "id"});
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  }).catch(() => null);
  return opened;
}

async function run(mode, action) {
  const database = await open();
  if (!database) return null;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(STORE, mode);
    const request = action(transaction.objectStore(STORE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

// Return all results: {id, createdAt, blob, input, settings, seed, model, size, seconds}.
export async function allResults() {
  const found = (await open()) ? await run("readonly", store => store.getAll()) : [...inMemory.values()];
  return found.sort((a, b) => b.createdAt - a.createdAt);
}

// Keep a result; delete the oldest ones above the limits. Resolves to the ids that were deleted.
export async function keepResult(result) {
  if (await open()) await run("readwrite", store => store.put(result));
  else inMemory.set(result.id, result);
  const deleted = [];
  let bytes = 0, count = 0;
  for (const each of await allResults()) {
    bytes += each.blob.size + (each.input?.size || 0);
    count += 1;
    if (each.id !== result.id && (count > MAX_RESULTS || bytes > MAX_BYTES)) deleted.push(each.id);
  }
  for (const id of deleted) await deleteResult(id);
  return deleted;
}

export async function deleteResult(id) {
  if (await open()) await run("readwrite", store => store.delete(id));
  else inMemory.delete(id);
}

export async function deleteAll() {
  if (await open()) await run("readwrite", store => store.clear());
  inMemory.clear();
}
