"""DESIGN's block-skipping attention once more, number by number in plain Python floats.

Shares no line with the package: the reference backend is tested against it. One request, one
query at a time, `exp` written out instead of logarithms, and every mask asked key by key.
"""

import math


def attention(
    q,
    k,
    v,
    *,
    scale,
    causal=True,
    q_offset=None,
    key_valid=None,
    window=None,
    softcap=None,
    sinks=None,
    rule=None,
    block_q=4,
    block_k=4,
    order="sink_diagonal",
    split_k=8,
    decode=False,
):
    """One request: q `[Hq][Lq][D]`, k `[Hkv][Lk][D]`, v `[Hkv][Lk][Dv]` as nested lists.

    `rule` has lists per head `lam` and `eps`, per head and block row `threshold`, and
    `keep_sink`. Returns out `[Hq][Lq][Dv]`, lse `[Hq][Lq]`, dropped `[Hq][Lq]`, and the skipped and
    visited blocks as sets of (voter, block row, block).
    """
    heads, q_len, kv_heads, kv_len = len(q), len(q[0]), len(k), len(k[0])
    group, v_dim = heads // kv_heads, len(v[0][0])
    rule = rule or {}
    valid = key_valid if key_valid is not None else [True] * kv_len
    offset = kv_len - q_len if q_offset is None else q_offset
    out = [[[0.0] * v_dim for _ in range(q_len)] for _ in range(heads)]
    lse = [[-math.inf] * q_len for _ in range(heads)]
    dropped = [[0.0] * q_len for _ in range(heads)]
    skipped, visited = set(), set()
    if True not in valid:
        return out, lse, dropped, skipped, visited
    first_key = valid.index(True)
    first_row = max(first_key - offset, 0) if causal else 0
    last_key = max(c for c in range(kv_len) if valid[c])

    def sees(r, c):
        position = offset + r
        return (
            valid[c] and (not causal or c <= position) and (window is None or c > position - window)
        )

    def is_padding(r):
        return causal and offset + r > last_key

    def score(h, r, c):
        s = scale * sum(a * b for a, b in zip(q[h][r], k[h // group][c], strict=True))
        return softcap * math.tanh(s / softcap) if softcap is not None else s

    def block_of(c):
        return (c - first_key) // block_k

    if decode:
        blocks_of_rows = [
            (g, i, [(g * group + x, r) for x in range(group)])
            for g in range(kv_heads)
            for i, r in enumerate(range(first_row, q_len))
        ]
    else:
        blocks_of_rows = [
            (h, i, [(h, r) for r in range(start, min(start + block_q, q_len))])
            for h in range(heads)
            for i, start in enumerate(range(first_row, q_len, block_q))
        ]
    for voter, i, rows in blocks_of_rows:
        keys = {}  # block -> {(h, r): [(column, score)]}
        for h, r in rows:
            for c in range(kv_len):
                if sees(r, c):
                    keys.setdefault(block_of(c), {}).setdefault((h, r), []).append(
                        (c, score(h, r, c))
                    )
        positions = [offset + r - first_key for _, r in rows]
        crossing = range(min(positions) // block_k, max(positions) // block_k + 1)
        diagonal = {j for j in crossing if j in keys} if causal else set()
        front = [j for j in (0, *sorted(diagonal - {0})) if j in keys]
        rest = [j for j in sorted(keys) if j not in front]
        if order == "ascending":
            seed, splits = [], [sorted(keys)]
        elif order == "descending":
            seed, splits = [], [sorted(keys, reverse=True)]
        elif decode:
            names = sorted({j * block_k // split_k for j in rest})
            seed = front
            splits = [[j for j in rest if j * block_k // split_k == s] for s in names]
        else:
            seed, splits = [], [front + rest]
        counted = not all(is_padding(r) for _, r in rows)
        kept = list(seed)
        total_c = dict.fromkeys(rows, 0.0)
        for split in splits:
            seen_scores = {row: [s for j in seed for _, s in keys[j].get(row, [])] for row in rows}
            m = {row: max(seen_scores[row], default=-math.inf) for row in rows}
            l = {row: sum(math.exp(s) for s in seen_scores[row]) / len(splits) for row in rows}
            c = dict.fromkeys(rows, 0.0)
            for j in split:
                agree = bool(rule)
                for row in rows:
                    here = [s for _, s in keys[j].get(row, [])]
                    if not here or (counted and is_padding(row[1])):
                        continue
                    h, m_new = row[0], max(here)
                    if rule.get("lam"):
                        log_lam = math.log(rule["lam"][h]) if rule["lam"][h] > 0 else -math.inf
                        agree = agree and m_new - m[row] < log_lam
                    if rule.get("threshold"):
                        agree = agree and m_new < rule["threshold"][h][i]
                    if rule.get("eps"):
                        would = c[row] + block_k * math.exp(m_new)
                        agree = agree and would <= rule["eps"][h] * l[row]
                protected = j in diagonal or (j == 0 and rule.get("keep_sink", True))
                if rule.get("threshold") and protected:
                    agree = False
                for row in rows:
                    here = [s for _, s in keys[j].get(row, [])]
                    if here and agree:
                        c[row] += block_k * math.exp(max(here))
                    elif here:
                        m[row] = max(m[row], *here)
                        l[row] += sum(math.exp(s) for s in here)
                if agree:
                    skipped.add((voter, i, j))
                else:
                    kept.append(j)
            for row in rows:
                total_c[row] += c[row]
        if counted:
            visited |= {(voter, i, j) for j in keys}
        for h, r in rows:
            pairs = [pair for j in kept for pair in keys[j].get((h, r), [])]
            total = sum(math.exp(s) for _, s in pairs)
            if sinks is not None and any(sees(r, c) for c in range(len(k[0]))):
                total += math.exp(sinks[h])
            if total > 0:
                lse[h][r] = math.log(total)
            if total + total_c[h, r] > 0:
                dropped[h][r] = total_c[h, r] / (total + total_c[h, r])
            for d in range(v_dim):
                numerator = sum(math.exp(s) * v[h // group][c][d] for c, s in pairs)
                out[h][r][d] = numerator / total if total > 0 else 0.0
    return out, lse, dropped, skipped, visited
